"""Models for other packages. Each module needs the extra of its name, and is imported only if it is used."""
