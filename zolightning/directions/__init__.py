"""Directions: what is added to a weight, as a function of integers.

In the order of reading:

* What all have in common: ``perturbation``.
* Of every element: ``dense``; with some left out, scaled or shifted: ``masked``, ``scaled``, ``slices``, ``cone``.
* Of the core of a matrix: ``basis``, ``low_rank``, ``signed``; bases from activations: ``second_moment``.
* All of them with the opposite sign: ``opposite``.
* For other purposes than a step: ``tangent`` (derivatives), ``trials`` (where weights are read).
* Where tensors are and how they are computed: ``shards``, ``autocast``.
"""
