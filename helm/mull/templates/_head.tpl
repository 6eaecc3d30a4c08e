{{/* Ray's head: the store of the cluster's state and Serve's controller; no gateway, no rank. */}}
{{- define "mull.headGroup" -}}
resources: {CPU: "0"}
rayStartParams:
  dashboard-host: 0.0.0.0
  object-store-memory: "200000000"
template:
  metadata:
    labels: {{- include "mull.labels" . | nindent 6 }}
    {{- with .Values.head.pod.annotations }}
    annotations: {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- include "mull.podSecurity" . | nindent 4 }}
    {{- $pod := merge (dict "serviceAccount" (include "mull.headAccount" .)) .Values.head.pod }}
    {{- include "mull.scheduling" (list . $pod) | nindent 4 }}
    containers:
      - name: ray-head
        {{- include "mull.imageFields" . | nindent 8 }}
        env: {{- include "mull.rayEnv" . | nindent 10 }}
        ports:
          - {name: gcs-server, containerPort: 6379}
          - {name: dashboard, containerPort: 8265}
          - {name: metrics, containerPort: 8080}
        resources: {{- toYaml .Values.head.resources | nindent 10 }}
        securityContext: {{- include "mull.containerSecurity" . | nindent 10 }}
        {{- include "mull.rayProbes" . | nindent 8 }}
        readinessProbe:
          {{- include "mull.rayHealth" . | nindent 10 }}
          periodSeconds: 5
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          - {name: shm, mountPath: /dev/shm}
    volumes:
      - {name: tmp, emptyDir: {}}
      - {name: shm, emptyDir: {medium: Memory, sizeLimit: 512Mi}}
      {{- if include "mull.isScaled" . }}
      {{- include "mull.autoscalerVolume" . | nindent 6 }}
      {{- end }}
{{- end }}
