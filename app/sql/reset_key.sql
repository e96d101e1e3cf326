-- Take an idempotency key off the run that has it.
-- $1 organization id  $2 environment id  $3 task  $4 idempotency key; text
-- $5 timestamptz: only if it was requested by then; null: whenever that was
-- Returns the run's id, or none.
UPDATE mollifier.runs AS run
SET idempotency_key = NULL, idempotency_key_expires_at = NULL, revision = revision + 1, updated_at = now()
WHERE run.idempotency_key IS NOT NULL
    AND mollifier.key_digest(run.organization_id, run.environment_id, run.task, run.idempotency_key)
        = mollifier.key_digest($1, $2, $3, $4)
    AND ($5::timestamptz IS NULL OR run.created_at <= $5)
RETURNING run.id
