"""Where rows come from: one file a source, each a function from its section of the configuration to `Rows`."""
