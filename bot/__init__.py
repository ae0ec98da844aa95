"""The recycling bot: one iteration (`bot.iteration`), the ledger, scheduling, dispatch and notification."""
