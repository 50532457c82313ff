"""What joins the core and the edges: one file a command."""
