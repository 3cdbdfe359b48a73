"""Recipes that regenerate the small data files shipped with the package."""
