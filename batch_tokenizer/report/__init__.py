"""A run's page: figures as SVG, recordings as data URLs, and the HTML around them. Nothing on it needs a network."""
