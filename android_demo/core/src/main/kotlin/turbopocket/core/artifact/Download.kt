// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.artifact

import turbopocket.core.Cancelled
import turbopocket.core.Refused
import turbopocket.core.refuse
import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.net.HttpURLConnection
import java.net.URI
import java.net.URL

/** How far a download is, in bytes of all listed files. */
data class DownloadProgress(val done: Long, val total: Long)

/**
 * An artifact's folder fetched from [source], an address under which its files lie by their paths.
 *
 * A download that broke off goes on where it was: what is there already stays, and half a file is asked for from its
 * end on. Each file gets its name only once its SHA-256 is the manifest's.
 */
class Download(private val source: String, private val folder: File) {
    /** The artifact. Throws Refused for what [Artifact.open] refuses, files that differ, and broken connections. */
    fun run(cancelled: () -> Boolean = { false }, progress: (DownloadProgress) -> Unit = {}): Artifact {
        try {
            folder.mkdirs()
            val beside = File(folder, ".download").apply { mkdirs() }
            fetch(MANIFEST_NAME, File(beside, MANIFEST_NAME).also { it.delete() }, null, cancelled) {}
            val manifest = readManifest(beside)
            manifest.requireParity()
            files(manifest, beside, cancelled, progress)
            move(File(beside, MANIFEST_NAME), File(folder, MANIFEST_NAME))
            beside.deleteRecursively()
        } catch (error: IOException) {
            throw Refused("the download from $source broke off: ${error.message ?: error.javaClass.simpleName}", error)
        }
        return Artifact.open(folder)
    }

    private fun files(
        manifest: Manifest,
        beside: File,
        cancelled: () -> Boolean,
        progress: (DownloadProgress) -> Unit,
    ) {
        val total = manifest.files.sumOf { it.bytes }
        var done = 0L
        for (entry in manifest.files) {
            val there = File(folder, entry.path)
            if (!there.isFile || there.length() != entry.bytes || sha256(there) != entry.sha256) {
                val part = File(beside, entry.sha256)
                if (part.length() > entry.bytes) part.delete()
                fetch(entry.path, part, entry, cancelled) { progress(DownloadProgress(done + it, total)) }
                requireHash(entry, part)
                move(part, there)
            }
            done += entry.bytes
            progress(DownloadProgress(done, total))
        }
    }

    private fun requireHash(entry: FileEntry, part: File) {
        val found = sha256(part)
        if (found == entry.sha256) return
        part.delete()
        refuse("${entry.path} came otherwise than the manifest says: its SHA-256 is $found, not ${entry.sha256}")
    }

    /** Appends to [part] what it lacks; of a file that is listed, at most its bytes. */
    private fun fetch(path: String, part: File, entry: FileEntry?, cancelled: () -> Boolean, got: (Long) -> Unit) {
        part.parentFile?.mkdirs()
        if (entry != null && part.length() == entry.bytes) {
            if (entry.bytes == 0L) part.createNewFile()
            return
        }
        val connection = URL(address(path)).openConnection() as? HttpURLConnection
            ?: refuse("$source is no address of a web server")
        try {
            connection.connectTimeout = TIMEOUT_MS
            connection.readTimeout = TIMEOUT_MS
            if (part.length() > 0) connection.setRequestProperty("Range", "bytes=${part.length()}-")
            val code = connection.responseCode
            if (code != HttpURLConnection.HTTP_OK && code != HttpURLConnection.HTTP_PARTIAL) {
                refuse("$path can not be had from $source: HTTP $code")
            }
            FileOutputStream(part, code == HttpURLConnection.HTTP_PARTIAL).use { out ->
                copy(connection, out, entry?.bytes ?: MOST_MANIFEST_BYTES, cancelled) { got(part.length()) }
            }
            if (entry != null && part.length() < entry.bytes) {
                throw IOException("$path ended after ${part.length()} of ${entry.bytes} bytes")
            }
            if (entry != null && part.length() > entry.bytes) {
                part.delete()
                refuse("$path from $source has more than the ${entry.bytes} bytes that the manifest says")
            }
        } finally {
            connection.disconnect()
        }
    }

    /** Writes what comes until the file is one byte longer than [most]. */
    private fun copy(
        connection: HttpURLConnection,
        out: FileOutputStream,
        most: Long,
        cancelled: () -> Boolean,
        got: () -> Unit,
    ) {
        val piece = ByteArray(1 shl 16)
        connection.inputStream.use { stream ->
            while (out.channel.position() <= most) {
                if (cancelled()) throw Cancelled()
                val count = stream.read(piece, 0, minOf(piece.size.toLong(), most + 1 - out.channel.position()).toInt())
                if (count < 0) return
                out.write(piece, 0, count)
                got()
            }
        }
    }

    private fun address(path: String): String {
        val encoded = URI(null, null, "/$path", null).rawPath
        return source.trimEnd('/') + encoded
    }

    private fun move(from: File, to: File) {
        to.parentFile?.mkdirs()
        to.delete()
        if (!from.renameTo(to)) throw IOException("$to can not be written")
    }

    private companion object {
        const val TIMEOUT_MS = 30_000
        const val MOST_MANIFEST_BYTES = 64L shl 20
    }
}
