"""How fast a training step is, on one rank and on many, and what that says about more."""
