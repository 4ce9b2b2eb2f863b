"""Models for other packages. Each module says which extra it needs, and is imported only if used."""
