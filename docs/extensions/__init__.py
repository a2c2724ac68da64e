"""What building the documentation takes beside Sphinx, MyST and furo."""
