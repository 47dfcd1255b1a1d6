"""What a stage begins anew after. Without Ray, which a command that ends at once need not import."""


class Fault(Exception):
    """What a stage cannot do without has ended, or is stuck: which process, and how, in one line. Nothing that it had
    is used again: the stage's roles are made anew, and it goes on from its newest checkpoint."""
