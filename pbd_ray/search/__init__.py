"""The round loop: what is known (state), what is written (ledger), when to stop, and the loop itself."""
