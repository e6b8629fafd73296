"""Whole volumes: sliding window, metrics, per-case tables and the report."""
