"""`rlhf doctor`: whether this machine can do what is asked of it."""
