// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.artifact

import turbopocket.core.refuse
import java.io.File
import java.security.MessageDigest

/**
 * A folder that `turbopocket build` made: proven (its parity is green), and no file of it is opened before its SHA-256
 * was found to be the manifest's.
 */
class Artifact private constructor(val folder: File, val manifest: Manifest) {
    private val listed = manifest.files.associateBy { it.path }
    private val checked = HashSet<String>()

    /** The listed file at [path], whose content is as the manifest says; hashed when first asked for. */
    @Synchronized
    fun file(path: String): File {
        val entry = listed[path] ?: refuse("$path is not in the manifest")
        val file = present(entry)
        if (path !in checked) {
            val found = sha256(file)
            if (found != entry.sha256) refuse("$path is damaged: its SHA-256 is $found, not ${entry.sha256}")
            checked += path
        }
        return file
    }

    /** A component's main file, once all files of its folder were found to be the manifest's. */
    fun componentFile(component: String): File {
        val spec = manifest.component(component)
        filesOf(spec).forEach { file(it.path) }
        return file(spec.file)
    }

    /** Bytes of a component's files: what opening it needs at least. */
    fun componentBytes(component: String): Long = filesOf(manifest.component(component)).sumOf { it.bytes }

    /** Bytes of all listed files together. */
    val totalBytes: Long get() = manifest.files.sumOf { it.bytes }

    private fun filesOf(spec: ComponentSpec): List<FileEntry> {
        val place = spec.file.substringBeforeLast('/', "")
        return manifest.files.filter {
            it.path == spec.file || it.path == spec.data || (place.isNotEmpty() && it.path.startsWith("$place/"))
        }
    }

    private fun present(entry: FileEntry): File {
        val file = File(folder, entry.path)
        if (!file.isFile) refuse("${entry.path} is missing (${entry.bytes} bytes in the manifest)")
        if (file.canonicalFile != File(folder.canonicalFile, entry.path)) {
            refuse("${entry.path} is a link, or lies behind one")
        }
        if (file.length() != entry.bytes) {
            refuse("${entry.path} has ${file.length()} bytes, not the manifest's ${entry.bytes}")
        }
        return file
    }

    companion object {
        /**
         * The artifact in [folder]. Throws Refused for a folder that holds none, an unknown schema, an artifact without
         * green parity, and listed files that are missing or of another length.
         */
        fun open(folder: File): Artifact {
            val manifest = readManifest(folder)
            manifest.requireParity()
            return Artifact(folder, manifest).also { artifact -> manifest.files.forEach { artifact.present(it) } }
        }
    }
}

/** The file's SHA-256 as 64 hexadecimal digits; read in pieces. */
fun sha256(file: File): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val piece = ByteArray(1 shl 20)
    file.inputStream().use { stream ->
        while (true) {
            val count = stream.read(piece)
            if (count < 0) break
            digest.update(piece, 0, count)
        }
    }
    return digest.digest().joinToString("") { "%02x".format(it) }
}
