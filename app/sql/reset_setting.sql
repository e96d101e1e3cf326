-- Leave something to the environment variables again.
-- $1 name, text
DELETE FROM mollifier.settings WHERE name = $1
