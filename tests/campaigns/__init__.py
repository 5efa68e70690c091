"""Campaigns that try to break what fastadv promises; `make campaign` runs them whole, the tests a seeded part."""
