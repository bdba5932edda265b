"""How good trained networks and their videos are: measures for held-out data and reports."""
