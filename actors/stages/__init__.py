"""The stages of a run. Each file is one stage's whole life: what goes in and the name of what it makes, its run, and
its way back. To add one: its file here, its name in `rlhf.config.STAGES`."""
