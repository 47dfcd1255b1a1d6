"""Where rewards come from. Each file is one kind of source: its settings (the keys of its YAML in conf/source), what is
checked of them, and what gives the rewards. To add one: its file here, a YAML in conf/source, a line in `kinds.py`; or,
from outside of this package, `kind: package.module:Class`, or an entry point of the group `rlhf.sources`."""
