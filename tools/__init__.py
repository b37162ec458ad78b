"""The project's tools. They run from the repository's root: ``python -m tools.NAME``."""
