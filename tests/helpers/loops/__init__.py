"""Tiny stock pipelines of every loop that mixes two predictions: real classes, random weights, no files; by class name."""
