"""The compiled core: one concept per extension module.  Use the names that the package exports instead."""
