-- Say who makes the changes of this transaction, for the audit.
-- $1 who, text
SELECT set_config('mollifier.operator', $1, true)
