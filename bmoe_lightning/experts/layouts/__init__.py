"""How models store experts, one file a layout."""
