-- Change one run, if nobody has changed it since. Who waits for a run that this ends waits no longer.
-- $1 id  $2 organization id  $3 environment id; text
-- $4 revision  $5 status  $6 metadata version  $18 delay_until  $19 idempotency key: as they must be
-- $7 status  $8 delay_until  $9 tags  $10 metadata  $11 metadata version  $12 cancelled_at  $13 cancel_reason
-- $14 idempotency key  $15 its expiry  $16 revision  $17 applied: as they are to be
-- Returns its row, or none.
WITH changed AS (
    UPDATE mollifier.runs AS run
    SET status = $7, delay_until = $8, tags = $9, metadata = $10, metadata_version = $11, cancelled_at = $12,
        cancel_reason = $13, idempotency_key = $14, idempotency_key_expires_at = $15, revision = $16,
        applied = $17, updated_at = now()
    WHERE run.id = $1 AND run.organization_id = $2 AND run.environment_id = $3
        AND run.revision = $4 AND run.status = $5 AND run.metadata_version = $6
        AND run.delay_until IS NOT DISTINCT FROM $18 AND run.idempotency_key IS NOT DISTINCT FROM $19
    RETURNING run.*
),
ended AS (
    UPDATE mollifier.waitpoints AS waitpoint SET status = 'COMPLETED'
    FROM changed
    WHERE waitpoint.child_run_id = changed.id AND changed.status = 'CANCELED'
)
SELECT * FROM changed
