"""The configuration tree, by wing, and its loading."""
