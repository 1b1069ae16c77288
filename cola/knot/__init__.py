"""The knot: the tie and its rounding, the base optimizer's state, and the learning rate afterwards."""
