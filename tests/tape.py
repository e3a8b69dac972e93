"""A list for modules of tests to note every evaluation in."""


class Tape(list):
    """Keeps what all evaluations of a step append to it: the traces of later ones are undone in plain lists only."""
