"""One loop, one sharded step factory and one checkpointer for all methods. Nothing here knows which method runs."""
