"""Programs that measure and train: `python -m eval.<name>`. Not part of the installed package."""
