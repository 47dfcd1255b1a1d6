"""Where the metrics of an alignment are sent beside `align/metrics.jsonl`, which is the record and is always written.

A kind of logger is a file here and a line in `kinds.py`; each imports its library when it is first used.
"""
