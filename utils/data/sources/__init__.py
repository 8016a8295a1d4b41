"""Where rows come from: local files, the hub, and which of them a step gets."""
