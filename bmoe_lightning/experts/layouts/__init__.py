"""Layouts: the ways in which models store experts, one file each."""
