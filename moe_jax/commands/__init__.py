"""The commands: each file joins the core and the edges for one of them."""
