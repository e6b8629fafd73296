"""Processes: who am I, the exchange between ranks, sums over them."""
