-- What operators decide while the fleet runs: who decided it, and how processes come to know.

-- The gate of one environment, or of all of an organization's; a null leaves it to the next in line.
CREATE TABLE mollifier.gate_settings (
    scope text NOT NULL CHECK (scope IN ('environment', 'organization')),
    id text NOT NULL,
    window_ms integer CHECK (window_ms > 0),
    threshold integer CHECK (threshold > 0),
    hold_ms integer CHECK (hold_ms > 0),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (scope, id)
);

-- What no process could make sense of never gets in.
ALTER TABLE mollifier.settings ADD CONSTRAINT settings_value CHECK (CASE name
    WHEN 'switch' THEN value IN ('"on"', '"off"', '"shadow"')
    WHEN 'drain.paused' THEN jsonb_typeof(value) = 'boolean'
    WHEN 'drain.rate' THEN value::numeric BETWEEN 0 AND 2147483647 AND value::numeric % 1 = 0
    ELSE true
END);

-- Every change, by the command or by hand; nobody but the owner can write it otherwise. Its ids grow in the order of commits: the newest is the revision.
CREATE TABLE mollifier.audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    who text,
    database_user text NOT NULL DEFAULT session_user,
    what text NOT NULL,
    before jsonb,
    after jsonb
);

COMMENT ON COLUMN mollifier.audit.who IS 'login and host of who used the command; null: changed by other means';

CREATE INDEX audit_by_what ON mollifier.audit (what, id DESC);

CREATE FUNCTION mollifier.audit_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    names text[] := '{organization_id,scope,id,updated_at}';
    was jsonb := to_jsonb(OLD);
    now_is jsonb := to_jsonb(NEW);
    changed jsonb := coalesce(now_is, was);
BEGIN
    was := coalesce(was -> 'value', jsonb_strip_nulls(was - names));
    now_is := coalesce(now_is -> 'value', jsonb_strip_nulls(now_is - names));
    IF was IS DISTINCT FROM now_is THEN
        -- Else a lower id could be committed after a higher one, which processes would pass over.
        PERFORM pg_advisory_xact_lock(hashtextextended('mollifier.audit', 0));
        INSERT INTO mollifier.audit (who, what, before, after) VALUES (
            nullif(current_setting('mollifier.operator', true), ''),
            CASE TG_TABLE_NAME
                WHEN 'settings' THEN changed ->> 'name'
                WHEN 'organization_settings' THEN 'organization ' || (changed ->> 'organization_id')
                ELSE 'gate ' || (changed ->> 'scope') || ' ' || (changed ->> 'id')
            END,
            was,
            now_is
        );
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER settings_audit AFTER INSERT OR UPDATE OR DELETE ON mollifier.settings
    FOR EACH ROW EXECUTE FUNCTION mollifier.audit_change();
CREATE TRIGGER organization_settings_audit AFTER INSERT OR UPDATE OR DELETE ON mollifier.organization_settings
    FOR EACH ROW EXECUTE FUNCTION mollifier.audit_change();
CREATE TRIGGER gate_settings_audit AFTER INSERT OR UPDATE OR DELETE ON mollifier.gate_settings
    FOR EACH ROW EXECUTE FUNCTION mollifier.audit_change();

CREATE FUNCTION mollifier.notify_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('mollifier_settings', '');
    RETURN NULL;
END
$$;

CREATE TRIGGER audit_notify AFTER INSERT ON mollifier.audit
    FOR EACH STATEMENT EXECUTE FUNCTION mollifier.notify_change();
