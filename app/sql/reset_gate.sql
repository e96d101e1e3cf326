-- Leave the gate of an environment or organization to the next in line again.
-- $1 scope, text  $2 id, text
DELETE FROM mollifier.gate_settings WHERE scope = $1 AND id = $2
