"""Helpers that the recipes share: command lines, output flags, memory measurement, generated sections of pages."""
