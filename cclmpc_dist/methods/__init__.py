"""Training methods: one interface, one file a method."""
