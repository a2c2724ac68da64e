"""Tables."""
def run(options):
    """Set tables."""
