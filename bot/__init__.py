"""The recycling bot: the iteration (`bot.iteration`), its ledger, schedule, dispatch and notifications."""
