"""One thin module per command: parse, call one service, print."""
