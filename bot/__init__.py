"""The recycling bot: one sentence (`bot.iteration`), its memory (`bot.ledger`) and its nerves."""
