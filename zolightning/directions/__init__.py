"""Directions: what is added to a weight, as a function of integers.

In the order of reading:

* What all have in common: ``perturbation``.
* Of every element: ``dense``; some of them left out, scaled or moved: ``masked``, ``scaled``, ``slices``, ``cone``.
* Of the core of a matrix: ``basis``, ``low_rank``, ``signed``; bases from activations: ``second_moment``.
* The other sign of all of them: ``opposite``.
* For other ends than a step: ``tangent`` (derivatives), ``trials`` (where weights are read).
* Where tensors lie and how they are computed: ``shards``, ``autocast``.
"""
