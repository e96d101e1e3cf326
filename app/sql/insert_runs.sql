-- Insert runs; rows whose id, key or token is taken are left out, be it by an alias.
-- $1  mollifier.new_run[]
-- Returns id, organization_id, environment_id of the rows that were inserted.
INSERT INTO mollifier.runs (
    id, organization_id, project_id, environment_id, environment_type, task, payload, payload_type, tags,
    idempotency_key, idempotency_key_expires_at, delay_until, ttl_seconds, expires_at, queue,
    concurrency_key, worker_queue, machine, priority, max_attempts, max_duration, locked_to_version,
    is_test, depth, parent_run_id, root_run_id, resume_parent_on_completion, batch_id, batch_index,
    debounce_key, debounce_until, one_time_use_token, replayed_from_run_id, trace_id, span_id,
    parent_span_id, created_at, buffered_at, status, metadata, idempotency_key_options, trace_context,
    cancelled_at, cancel_reason, error, metadata_version, revision, applied
)
SELECT new.* FROM unnest($1::mollifier.new_run[]) AS new
LEFT JOIN mollifier.run_aliases AS alias ON alias.id = new.id
LEFT JOIN mollifier.run_aliases AS used ON used.one_time_use_token = new.one_time_use_token
WHERE alias.id IS NULL AND used.id IS NULL
ON CONFLICT DO NOTHING
RETURNING id, organization_id, environment_id
