"""What `narrows calibrate` runs: plans and collectives timed on ranks of this machine, and the tables they become."""
