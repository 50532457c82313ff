"""The only room that knows mesh axes: everything else names logical axes."""
