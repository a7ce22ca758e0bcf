{{/* What every pod has: who runs it and what it may do. */}}
{{- define "ngd.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ int . }}
{{- end }}
{{- with .Values.podSecurity.runAsGroup }}
runAsGroup: {{ int . }}
{{- end }}
{{- with .Values.podSecurity.fsGroup }}
fsGroup: {{ int . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "ngd.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "ngd.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* Annotations of a pod that a job would have to begin again without, if it is one: nothing moves it to save nodes. */}}
{{- define "ngd.doNotDisrupt" -}}
{{- if . -}}
cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
karpenter.sh/do-not-disrupt: "true"
{{- end -}}
{{- end -}}

{{/* The controller's pod; the separate dashboard is one too. (dict "root" . "component" "controller" "resources" ...) */}}
{{- define "ngd.controllerPod" -}}
{{- $root := .root -}}
{{- $v := .root.Values -}}
metadata:
  labels:
    {{- include "ngd.podLabels" . | nindent 4 }}
    {{- with $v.controller.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "ngd.rayJobTemplate" $root | sha256sum }}
    {{- $runsJobs := and (eq $v.dispatcher.mode "local") $v.dispatcher.local.doNotDisrupt }}
    {{- with merge (dict) (default dict $v.controller.podAnnotations) (include "ngd.doNotDisrupt" $runsJobs | fromYaml) }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "ngd.serviceAccountName" $root }}
  automountServiceAccountToken: {{ eq $v.dispatcher.mode "kuberay" }}
  # A Service called ngd would otherwise set NGD_PORT in every pod of the namespace.
  enableServiceLinks: false
  {{- if eq $v.dispatcher.mode "local" }}
  # The controller starts drivers, whose Ray leaves processes behind: the pause container, as process 1, reaps them.
  shareProcessNamespace: true
  {{- end }}
  {{- with include "ngd.pullSecrets" $root }}
  {{- . | nindent 2 }}
  {{- end }}
  securityContext:
    {{- include "ngd.podSecurityContext" $root | nindent 4 }}
  terminationGracePeriodSeconds: {{ int $v.controller.terminationGracePeriodSeconds }}
  {{- with $v.controller.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $v.controller.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.controller.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.controller.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and $v.controller.topologyKey (eq .component "controller") (include "ngd.severalControllers" $root) }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ $v.controller.topologyKey }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "ngd.selectorLabels" . | nindent 10 }}
  {{- end }}
  initContainers:
    - name: migrate
      {{- include "ngd.controllerContainer" . | nindent 6 }}
      args: [migrate]
  containers:
    - name: controller
      {{- include "ngd.controllerContainer" . | nindent 6 }}
      args: [serve]
      ports:
        - name: http
          containerPort: 8000
          protocol: TCP
      startupProbe:
        httpGet: {path: /healthz, port: http}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: {{ max 1 (div (int $v.controller.startupSeconds) 2) }}
      livenessProbe:
        httpGet: {path: /healthz, port: http}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet: {path: /readyz, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ int $v.controller.preStopSleepSeconds | toString | quote }}]
  volumes:
    {{- include "ngd.controllerVolumes" $root | nindent 4 }}
{{- end -}}

{{/* What the migration and the controller share. */}}
{{- define "ngd.controllerContainer" -}}
{{- $root := .root -}}
image: {{ include "ngd.controllerImage" $root }}
imagePullPolicy: {{ include "ngd.controllerPullPolicy" $root }}
command: [ngd]
env:
  {{- include "ngd.controllerEnv" $root | nindent 2 }}
securityContext:
  {{- include "ngd.containerSecurityContext" $root | nindent 2 }}
resources:
  {{- toYaml .resources | nindent 2 }}
volumeMounts:
  {{- include "ngd.controllerMounts" $root | nindent 2 }}
{{- end -}}

{{/* The service's settings; their names are fields of service/ngd_service/settings.py. */}}
{{- define "ngd.controllerEnv" -}}
{{- $own := include "ngd.ownEnv" . -}}
{{ $own }}
{{- $taken := list -}}
{{- range fromYamlArray $own }}{{ $taken = append $taken .name }}{{ end -}}
{{- range .Values.controller.extraEnv }}
{{- if has .name $taken }}
{{- fail (printf "controller.extraEnv sets %s, which the chart sets: use the value that stands for it (settings, controller, database, dispatcher ...)" .name) }}
{{- end }}
{{ toYaml (list .) }}
{{- end }}
{{- end -}}

{{- define "ngd.ownEnv" -}}
{{- $v := .Values -}}
- {name: HOME, value: /tmp}
- {name: NGD_HOST, value: {{ $v.controller.host | quote }}}
- {name: NGD_PORT, value: "8000"}
- {name: NGD_HOME, value: /var/lib/ngd}
- {name: NGD_API_KEYS_DIR, value: /etc/ngd/api-keys}
{{- if not $v.auth.existingSecret }}
- {name: NGD_API_KEY_FILE, value: /etc/ngd/api-keys/first} # for ngd in this pod
{{- end }}
- {name: NGD_SIGNING_KEY_FILE, value: /etc/ngd/signing-key/key}
- {name: NGD_WORKER_URL, value: {{ include "ngd.workerUrl" . | quote }}}
{{- with include "ngd.publicUrl" . }}
- {name: NGD_PUBLIC_URL, value: {{ . | quote }}}
{{- end }}
{{- include "ngd.databaseEnv" . }}
{{- if $v.storage.data.existingClaim }}
- {name: NGD_DATA_DIR, value: /var/lib/ngd/data}
{{- end }}
{{- if $v.storage.secrets.existingSecret }}
- {name: NGD_SECRETS_DIR, value: /etc/ngd/job-secrets}
{{- end }}
- {name: NGD_DISPATCHER, value: {{ $v.dispatcher.mode }}}
{{- if ne $v.dispatcher.mode "local" }}
- {name: NGD_RUNS_DIR, value: /var/lib/ngd/runs}
{{- end }}
{{- if eq $v.dispatcher.mode "ray_jobs" }}
- {name: NGD_RAY_ADDRESS, value: {{ include "ngd.rayAddress" . | quote }}}
{{- if include "ngd.rayTokenSecret" . }}
- {name: NGD_RAY_TOKEN_FILE, value: /etc/ngd/ray-auth/auth_token}
{{- end }}
{{- else if eq $v.dispatcher.mode "kuberay" }}
- {name: NGD_RAYJOB_TEMPLATE, value: /etc/ngd/rayjob/rayjob.yaml}
- {name: NGD_KUBERNETES_NAMESPACE, value: {{ .Release.Namespace }}}
{{- end }}
{{- include "ngd.settingsEnv" . }}
{{- end -}}

{{- define "ngd.settingsEnv" -}}
{{- $names := dict "maxRunningJobs" "MAX_RUNNING_JOBS" "tickSeconds" "TICK_S" "leaseSeconds" "LEASE_S" "retryBackoffSeconds" "RETRY_BACKOFF_S" "maxFailedStarts" "MAX_FAILED_STARTS" "startBackoffSeconds" "START_BACKOFF_S" "cancelGraceSeconds" "CANCEL_GRACE_S" "interruptGraceSeconds" "INTERRUPT_GRACE_S" "unreachableSeconds" "UNREACHABLE_S" -}}
{{- range $value, $name := $names }}
{{- $given := index $.Values.settings $value }}
{{- if not (kindIs "invalid" $given) }}
{{- /* Helm reads every number as a float, and would write a million as 1e+06. */}}
{{- $number := ternary (int64 $given | toString) ($given | toString) (eq (float64 (int64 $given)) (float64 $given)) }}
- {name: NGD_{{ $name }}, value: {{ $number | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* The password is libpq's PGPASSWORD: in the URL it would have to be percent-encoded. */}}
{{- define "ngd.databaseEnv" -}}
{{- $db := .Values.database -}}
{{- if eq $db.type "postgres" }}
{{- if $db.existingSecret }}
- name: NGD_DATABASE_URL
  valueFrom:
    secretKeyRef: {name: {{ $db.existingSecret }}, key: {{ $db.existingSecretKey }}}
{{- else }}
- name: PGPASSWORD
  valueFrom:
    secretKeyRef: {name: {{ $db.passwordSecret }}, key: {{ $db.passwordSecretKey }}}
- {name: PGSSLMODE, value: {{ $db.sslMode }}}
{{- if $db.caSecret }}
- {name: PGSSLROOTCERT, value: /etc/ngd/database-ca/ca.crt}
{{- end }}
- {name: NGD_DATABASE_URL, value: {{ printf "postgresql://%s@%s:%d/%s" ($db.user | urlquery) $db.host (int $db.port) ($db.name | urlquery) | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "ngd.controllerMounts" -}}
{{- $v := .Values -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/ngd}
{{- if ne $v.dispatcher.mode "local" }}
- {name: runs, mountPath: /var/lib/ngd/runs}
{{- else }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- if $v.storage.data.existingClaim }}
- {name: data, mountPath: /var/lib/ngd/data, readOnly: true}
{{- end }}
{{- if and (eq $v.dispatcher.mode "local") $v.storage.secrets.existingSecret }}
- {name: job-secrets, mountPath: /etc/ngd/job-secrets, readOnly: true}
{{- end }}
- {name: api-keys, mountPath: /etc/ngd/api-keys, readOnly: true}
- {name: signing-key, mountPath: /etc/ngd/signing-key, readOnly: true}
{{- if include "ngd.rayTokenSecret" . }}
- {name: ray-auth, mountPath: /etc/ngd/ray-auth, readOnly: true}
{{- end }}
{{- if eq $v.dispatcher.mode "kuberay" }}
- {name: rayjob, mountPath: /etc/ngd/rayjob, readOnly: true}
{{- end }}
{{- if and (eq $v.database.type "postgres") $v.database.caSecret }}
- {name: database-ca, mountPath: /etc/ngd/database-ca, readOnly: true}
{{- end }}
{{- with $v.controller.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "ngd.controllerVolumes" -}}
{{- $v := .Values -}}
- name: tmp
  emptyDir: {}
- name: home
  {{- if include "ngd.homeClaim" . }}
  persistentVolumeClaim: {claimName: {{ include "ngd.homeClaim" . }}}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- if ne $v.dispatcher.mode "local" }}
- name: runs
  persistentVolumeClaim: {claimName: {{ include "ngd.runsClaim" . }}}
{{- else }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ $v.dispatcher.local.shmSize }}}
{{- end }}
{{- with $v.storage.data.existingClaim }}
- name: data
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- if and (eq $v.dispatcher.mode "local") $v.storage.secrets.existingSecret }}
- name: job-secrets
  secret: {secretName: {{ $v.storage.secrets.existingSecret }}, defaultMode: 0440}
{{- end }}
- name: api-keys
  secret: {secretName: {{ include "ngd.apiKeysSecret" . }}, defaultMode: 0440}
- name: signing-key
  secret: {secretName: {{ include "ngd.signingKeySecret" . }}, defaultMode: 0440}
{{- with include "ngd.rayTokenSecret" . }}
- name: ray-auth
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- if eq $v.dispatcher.mode "kuberay" }}
- name: rayjob
  configMap: {name: {{ include "ngd.fullname" . }}-rayjob}
{{- end }}
{{- if and (eq $v.database.type "postgres") $v.database.caSecret }}
- name: database-ca
  secret: {secretName: {{ $v.database.caSecret }}, defaultMode: 0440}
{{- end }}
{{- with $v.controller.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
