"""Who decodes. ``base`` is the door by which the search drives any engine."""
