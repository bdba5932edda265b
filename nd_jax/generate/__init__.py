"""Videos from prompts: the rollout of the pyramid, the networks around it in turn, and the files that come out."""
