"""Mollifier: the front door that takes a storm of triggers and gives Postgres a breeze."""
