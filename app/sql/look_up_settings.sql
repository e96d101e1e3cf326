-- What operators have decided for the whole fleet.
-- Returns name, and value as JSON text.
SELECT name, value FROM mollifier.settings
